"""Programs that measure speed and memory, as ratios against baselines timed in the same run; see README.md here."""
