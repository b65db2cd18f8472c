# services.nix-relay.stores: own-stores.md for NixOS.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  cfg = config.services.nix-relay;
  stores = lib.attrsToList cfg.stores;
  directory = name: "/var/lib/nix-relay/${name}";
  wrapper = "${./nix-relay-store}";
  programs = [
    config.nix.package
    pkgs.bubblewrap
    pkgs.util-linux
  ];

  # What own-stores.conf sets, but for the path of the wrapper.
  permissions =
    let
      setting = builtins.match "([A-Z][A-Za-z]+)=(.*)";
      lines = map (line: if builtins.isString line then setting line else null) (
        builtins.split "\n" (builtins.readFile ./own-stores.conf)
      );
      found = builtins.filter (pair: pair != null && builtins.head pair != "Environment") lines;
    in
    builtins.mapAttrs (
      _: pairs:
      lib.mkDefault (
        if builtins.length pairs == 1 then lib.last (builtins.head pairs) else map lib.last pairs
      )
    ) (builtins.groupBy builtins.head found);

  rule =
    { name, value }:
    value.rule
    // {
      inherit name;
      extra_args = [
        (directory name)
        "--ro-bind"
        "${pkgs.writeText "nix.conf" value.nixConf}"
        "/etc/nix/store.conf"
      ]
      ++ (if value.network then [ ] else [ "--unshare-net" ])
      ++ [
        "--"
        "nix-daemon"
        "--stdio"
      ];
    };

  collection =
    { name, value }:
    {
      name = "nix-relay-gc-${name}";
      value = {
        description = "Collect garbage in the store ${name} of nix-relay";
        startAt = value.dates;
        path = programs;
        serviceConfig = {
          Type = "oneshot";
          User = "nix-relay";
          ExecStart = "${wrapper} ${directory name} -- nix-store --gc";
        };
      };
    };
in
{
  options.services.nix-relay.stores = mkOption {
    description = ''
      Stores for one rule each, in /var/lib/nix-relay. The rule has the name of its store, and stores' rules are tried in
      the order of their names, after those of `settings.auth.rule`. For a limit on its size, mount a file system there.
    '';
    example.main.rule.bound_claims = {
      repository = "your-organisation/project";
      ref = "refs/heads/main";
    };
    default = { };
    type = types.attrsOf (
      types.submodule {
        options = {
          rule = mkOption {
            type = types.attrsOf types.anything;
            default = { };
            description = "The rule, as in `settings.auth.rule`, but for `name` and `extra_args`.";
          };
          network = mkOption {
            type = types.bool;
            default = true;
            description = "Whether its jobs have the machine's network, 127.0.0.1 included; without, they have none.";
          };
          nixConf = mkOption {
            type = types.str;
            default = "";
            example = "min-free = 5368709120";
            description = "What nix.conf says there.";
          };
          dates = mkOption {
            type = types.str;
            default = "weekly";
            description = "When what no session uses is deleted, as of {manpage}`systemd.time(7)`.";
          };
        };
      }
    );
  };

  config = lib.mkIf (cfg.enable && cfg.stores != { }) {
    assertions = map (
      { name, value }:
      {
        assertion = builtins.match "[a-zA-Z0-9-]+" name != null;
        message = "services.nix-relay.stores cannot have \"${name}\": use letters, digits and hyphens.";
      }
    ) stores;

    services.nix-relay.settings = {
      daemon.nix_daemon_path = wrapper;
      auth.rule = lib.mkAfter (map rule stores);
    };

    systemd.services = builtins.listToAttrs (map collection stores) // {
      nix-relay = {
        path = programs;
        serviceConfig = permissions;
      };
    };
  };
}
