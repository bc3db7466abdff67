"""Single quantized layers of the formats, made by hand from the formats' documents."""
