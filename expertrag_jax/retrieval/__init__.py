"""What to retrieve: corpora, indexes of four kinds, the retriever. Importing it loads no search library."""
