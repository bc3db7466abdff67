"""What a conversion did: report, record summary, HTML page, model card."""
