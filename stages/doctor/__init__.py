"""`rats doctor`: checks packages, devices and models before a stage needs them."""
