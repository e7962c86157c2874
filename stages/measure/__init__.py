"""What is measured: judge features, KID, intervals, pictures and values."""
