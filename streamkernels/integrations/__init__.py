"""Borders to other projects; nothing here is imported until it is named."""
