"""What committed rows cost and saved: ledgers, the measured speed-up, the break-even rule."""
