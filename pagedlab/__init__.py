"""pagedlab (being assembled)."""
