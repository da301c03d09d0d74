"""dlrm_scale: train recommenders whose embedding tables outgrow one machine."""
