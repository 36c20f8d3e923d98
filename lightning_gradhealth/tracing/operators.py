"""The operators of torch that are known by name; all others are known by what they do, see `probe`."""

# operands (data, weight) of the operators that multiply and sum; either may be the weight where both are given as data
CONTRACTIONS = {
    "mm": (0, 1),
    "addmm": (1, 2),
    "_addmm_activation": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "addbmm": (1, 2),
    "mv": (1, 0),
    "addmv": (2, 1),
    "dot": (0, 1),
    "linear": (0, 1),
    "mkldnn_linear": (0, 1),
    "_trilinear": (0, 1),
    "convolution": (0, 1),
    "_convolution": (0, 1),
    "mkldnn_convolution": (0, 1),
    "convolution_overrideable": (0, 1),
    "_conv_depthwise2d": (0, 1),
    "_slow_conv2d_forward": (0, 1),
}
ONE_SIDED = {
    "convolution",
    "_convolution",
    "linear",
    "mkldnn_linear",
    "mkldnn_convolution",
    "convolution_overrideable",
}
ONE_SIDED |= {"_conv_depthwise2d", "_slow_conv2d_forward", "_trilinear"}
LOOKUPS = {"embedding", "embedding_renorm", "_embedding_bag", "_embedding_bag_forward_only", "embedding_bag"}
NORMS = {
    "native_layer_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm_elemt",
    "_fused_rms_norm",
    "rms_norm",
    "layer_norm",
    "group_norm",
    "instance_norm",
}
SUMS = {"add", "sub", "rsub"}
VIEWS = {
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "reshape",
    "t",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "clone",
    "contiguous",
    "_to_copy",
    "to",
    "lift_fresh",
    "lift_fresh_copy",
    "expand",
}
