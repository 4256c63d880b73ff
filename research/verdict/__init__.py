"""The verdict on the card: every sentence confronted with what is recorded; `research.verdict.ledger` writes it."""
