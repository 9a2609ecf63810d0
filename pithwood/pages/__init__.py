"""What is generated in the documents: tables and numbers from results files, the configuration page, the recipes."""
