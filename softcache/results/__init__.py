"""What people look at: metrics, comparisons, exported students, reports."""
