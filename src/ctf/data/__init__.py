"""Images and their codes on disk.

sources     folders, .tar and .parquet files of encoded images
decode      an encoded image -> an RGB image; formats tells by its first bytes what it is
tiff        TIFF files that Pillow cannot read or reads with the wrong range
transforms  crops and views; conversion between PIL images, arrays and tensors
scan        the size, hash and damage of every image of a source
image_set   labelled images of one size; images opens them by name
sheets      the sets that are included: fashion_mnist and eurosat
extraction  an image set -> codes, in the files of shards, which tokens reads
"""
