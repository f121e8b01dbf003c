"""What the service does with faults and bad input, case by case, and what others do with the same."""
