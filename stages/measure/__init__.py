"""What is measured: judge features, KID, bootstrap intervals, pictures and values."""
