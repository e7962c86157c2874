"""`rats serve`: a reward behind HTTP. The reward is `reward`, who is answered `service`, the bytes `transfer`."""
