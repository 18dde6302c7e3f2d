"""A page in the browser that shows a volume and all that was made of it, with Neuroglancer."""
