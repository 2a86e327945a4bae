"""The laws, a module a slot; `policy` has those of every slot."""
