"""Generated protocol code. Never edited by hand: `make proto` writes it."""
