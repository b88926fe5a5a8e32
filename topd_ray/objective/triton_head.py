from topd_ray.objective.head import Head


def make_head(*args, **kwargs) -> Head:
    return Head(*args, **kwargs)
