"""What one types: a folder for each verb of the command line."""
