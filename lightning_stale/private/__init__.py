"""Every reach into something private of Lightning, torch or Hydra: nowhere else is there one."""
