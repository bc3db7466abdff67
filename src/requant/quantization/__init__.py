"""What a layer is quantized to, and what the user asks for: modes, recipes, options."""
