"""BVFI: sharp video of a high frame rate from blurry video of a low one, in three stages."""
