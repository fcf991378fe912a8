"""The one thing pyproject.toml cannot say: dvit_kernels lives under kernels/, which is itself no package."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dvit_infer", "dvit_infer.*"]), *find_packages("kernels")],
    package_dir={"dvit_kernels": "kernels/dvit_kernels"},
    package_data={
        "dvit_infer": ["py.typed", "digits-0.7.pth"],
        "dvit_infer.ops": ["measured/*.json"],
        "dvit_infer.report": ["page.*"],
    },
)
