"""What training reads: record -> store -> dataset -> batch. May touch text and tensors; knows no model."""
