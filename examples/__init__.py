"""What users may begin with; each file stands alone."""
