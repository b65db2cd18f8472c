# As much of NixOS as the module uses.
{ lib, nix }:
let
  inherit (lib.types) anything attrsOf listOf;
in
{
  options =
    let
      option = type: default: lib.mkOption { inherit type default; };
    in
    {
      assertions = option (listOf anything) [ ];
      networking.firewall.allowedTCPPorts = option (listOf anything) [ ];
      networking.proxy.envVars = option anything { };
      nix.package = option anything nix;
      nix.settings = option (attrsOf anything) { };
      services.nginx = option anything { };
      systemd.packages = option (listOf anything) [ ];
      systemd.services = option (attrsOf anything) { };
      systemd.sockets = option (attrsOf anything) { };
      users.groups = option (attrsOf anything) { };
      users.users = option (attrsOf anything) { };
    };
}
