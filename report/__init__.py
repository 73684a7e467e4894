"""Reports: charts and HTML pages about training runs and models, and checks of runs."""
