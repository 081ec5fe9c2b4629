"""A testbed of real, trained, small LLaVA models: one base, honest and backdoored projectors."""
