"""`rats doctor`: packages, devices and models, looked at before a stage needs them."""
