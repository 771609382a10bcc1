"""fp16 safety: find what overflows (audit), rescale it away (fix), and prove it (certificate)."""
