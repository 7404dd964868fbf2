"""The warp-specialised `pooled` and `sampled` scores for Hopper, in Gluon.

Same arithmetic as `peaks`: products of the rows with one column of every key block at a time, the
largest kept element by element. Keys lie by their place in the block, so that such a column is a
box that one tensor copy brings, into a ring of columns of 128 key blocks.

Two warpgroups multiply (`multiply`): each owns 64 rows and takes the maximum of one product while
the next is under way. Its block maxima go to a slab of scratch. When the rows of an item are done,
their own maxima are known, and two warps (`ratios`) turn the slab into scores during the products
of the next item, in steps whose block maxima they copy one step ahead. Two more copy (`copy`). The
slab's tiles have been read by the time the last columns are brought that a tile's new maxima need.

Gluon cannot be interpreted, so nothing imports the modules of this folder before they are needed.
"""
