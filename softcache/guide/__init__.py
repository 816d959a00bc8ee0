"""The guide: Markdown pages that ship with the package."""
