# client.sh as a program, with those that it runs.
{
  lib,
  writeShellApplication,
  bash,
  coreutils,
  curl,
  websocat,
}:
writeShellApplication {
  name = "nix-relay-client";
  # bash is the sh that websocat runs.
  runtimeInputs = [
    bash
    coreutils
    curl
    websocat
  ];
  text = lib.removePrefix "#!/usr/bin/env bash\n" (builtins.readFile ../client.sh);
  meta = {
    description = "What an unchanged nix runs in place of ssh to reach a nix-relay";
    license = lib.licenses.mit;
    platforms = lib.platforms.unix;
  };
}
