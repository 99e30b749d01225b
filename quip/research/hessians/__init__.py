"""What the Hessians of a model are like, before and after processing."""
