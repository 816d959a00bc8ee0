"""Run the teacher once: its softened class probabilities in one file, any number of students."""

__version__ = "0.1.0"
