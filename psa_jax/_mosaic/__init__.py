"""What every Pallas kernel of this package needs and what means nothing by itself.

`device` says where kernels run, `channels` which head dimensions they have code for, `launch`
starts one, `products` multiplies on the tensor cores. Rules of the specification do not belong
here.
Importing this package brings no Pallas along; `launch` and `products` do.
"""
