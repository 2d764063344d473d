"""Real cluster traces as events: what a scheduler recorded goes through the same topics as what an agent sends.

Reading order: rows and trace (CSV), place (who held which GPU), facts (events), replayer (sending), complete (waiting
for the ledger); openb, helios and capacity are adapters for two public traces.
"""
