# The packages, for Nix without flakes as well: `nix-build nix -A nix-relay`.
{
  pkgs ? import <nixpkgs> { },
}:
rec {
  nix-relay = pkgs.callPackage ./package.nix { };
  nix-relay-static = pkgs.pkgsStatic.callPackage ./package.nix { };
  # Nix runs it as `nix-relay-client --stdio`.
  nix-relay-client =
    if pkgs.stdenv.hostPlatform.isLinux then
      pkgs.runCommandLocal "nix-relay-client-${nix-relay-static.version}"
        {
          meta = nix-relay-static.meta // {
            mainProgram = "nix-relay-client";
          };
        }
        ''
          mkdir -p $out/bin
          ln -s ${pkgs.lib.getExe nix-relay-static} $out/bin/nix-relay
          ln -s nix-relay $out/bin/nix-relay-client
        ''
    else
      pkgs.callPackage ./client.nix { };
}
