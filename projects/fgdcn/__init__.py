"""FGDCN: video frame interpolation with flow-guided deformable compensation."""
