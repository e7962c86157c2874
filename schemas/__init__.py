"""What is on disk and what passes between the stages: plain data, never torch."""
