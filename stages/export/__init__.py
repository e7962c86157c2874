"""`rats export`: a student for plain diffusers, with its model card."""
