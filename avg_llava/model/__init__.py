"""The AVG-LLaVA model: LLaVA-NeXT with a granularity scaler and a granularity router."""
