"""The guard against reward hacking: who looks on while a student trains, and what makes it stop."""
