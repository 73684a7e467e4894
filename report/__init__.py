"""Reports: from metrics to charts and pages."""
