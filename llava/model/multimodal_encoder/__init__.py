"""Vision towers: from pixels to patch features (upstream `llava/model/multimodal_encoder`)."""
