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

  # The settings of a service in a file of this directory.
  service =
    file:
    let
      text = builtins.replaceStrings [ "\\\n" ] [ "" ] (builtins.readFile (./. + "/${file}"));
      section = lib.last (builtins.split "\\[Service]\n" text);
      setting = builtins.match "([A-Z][A-Za-z]+)=(.*)";
      lines = map (line: if builtins.isString line then setting line else null) (
        builtins.split "\n" section
      );
    in
    builtins.mapAttrs (
      _: pairs: if builtins.length pairs == 1 then lib.last (builtins.head pairs) else map lib.last pairs
    ) (builtins.groupBy builtins.head (builtins.filter (pair: pair != null) lines));

  # But for the path of the wrapper.
  permissions = builtins.mapAttrs (_: lib.mkDefault) (
    builtins.removeAttrs (service "own-stores.conf") [ "Environment" ]
  );

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

  garbage = service "nix-relay-gc@.service";
  collection =
    { name, value }:
    {
      name = "nix-relay-gc-${name}";
      value = {
        description = "Collect garbage in the store ${name} of nix-relay";
        startAt = value.dates;
        path = programs;
        unitConfig.RequiresMountsFor = directory name;
        serviceConfig = garbage // {
          ExecStart =
            builtins.replaceStrings [ "/usr/local/bin/nix-relay-store" "%i" ] [ wrapper name ]
              garbage.ExecStart;
        };
      };
    };

  limited = builtins.filter ({ value, ... }: value.size != null) stores;
  image = name: "/var/lib/nix-relay-${name}.img";
  # It runs each time before the file system is mounted. systemd would not check one that is in a file.
  making =
    { name, value }:
    {
      name = "nix-relay-size-${name}";
      value = {
        description = "Make the file system for the store ${name} of nix-relay, or change its size";
        path = [ pkgs.e2fsprogs ];
        serviceConfig = {
          Type = "oneshot";
          UMask = "0077";
        };
        script = ''
          image=${image name}
          if [ -e $image ]; then
            e2fsck -f -p $image || [ $? = 1 ]
            resize2fs $image ${value.size}
          else
            rm -f $image.new
            mkfs.ext4 -q -m 0 -E root_owner=$(id -u nix-relay):$(id -g nix-relay) $image.new ${value.size}
            mv $image.new $image
          fi
        '';
      };
    };
  mount =
    { name, ... }:
    let
      needed = [ "nix-relay-size-${name}.service" ];
    in
    {
      what = image name;
      where = directory name;
      type = "ext4";
      # Without `nofail` it would come before all services, that one included.
      options = "loop,nofail,nosuid,nodev";
      requires = needed;
      after = needed;
    };
in
{
  options.services.nix-relay.stores = mkOption {
    description = ''
      Stores for one rule each, in /var/lib/nix-relay. The rule has the name of its store, and stores' rules are tried in
      the order of their names, after those of `settings.auth.rule`.
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
          size = mkOption {
            type = types.nullOr (types.strMatching "[1-9][0-9]*[MGT]");
            default = null;
            example = "100G";
            description = ''
              How large the store may be: it gets a file system of that size, in /var/lib/nix-relay-NAME.img, which takes
              as much of the disk as it has ever held. Another size applies from the next boot on. It hides a store
              that was there before. Null is no limit.
            '';
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

    systemd.mounts = map mount limited;
    systemd.services = builtins.listToAttrs (map collection stores ++ map making limited) // {
      "nix-relay${lib.optionalString cfg.takeTurns "@"}" = {
        path = programs;
        unitConfig.RequiresMountsFor = map ({ name, ... }: directory name) limited;
        serviceConfig = permissions;
      };
    };
  };
}
