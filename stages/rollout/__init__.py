"""`rats stage rollout` and `rats stage score`: the teacher's samples, and scores as columns beside them."""
