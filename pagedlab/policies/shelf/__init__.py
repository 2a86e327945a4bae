"""The eviction shelf: policies from half a century of caching, and those that know they cache prefixes."""
