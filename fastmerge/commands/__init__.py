"""What the command line shows beside merging: measurements, diagnoses, estimates."""
