"""Recognition with frozen features, CAPI's protocol: probes of image classes, segmentation by k-NN and regression."""
